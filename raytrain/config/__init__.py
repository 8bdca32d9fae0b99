"""The configuration of a run as one validated record, made of files and `key=value` words."""
