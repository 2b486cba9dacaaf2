"""Images to region records in a store, by one process, several, or MPI ranks."""
