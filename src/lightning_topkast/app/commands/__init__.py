"""The console scripts, one module each: arguments, messages and exit codes."""
