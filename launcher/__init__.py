"""From one machine to a cluster: starting and supervising jobs, planning memory and time, checking before the start. Without torch."""
