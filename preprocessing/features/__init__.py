"""Region features of other projects: in, out, joined and shown."""
