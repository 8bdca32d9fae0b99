"""The command line: progress on stderr, live on a terminal; results on stdout."""
