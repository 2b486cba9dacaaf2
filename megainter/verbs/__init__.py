"""The verbs of the command line, one file per group; heavy imports only inside a verb."""
