"""The run as one validated record, and how files and `key=value` words become one."""
