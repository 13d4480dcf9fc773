"""The ``moesurg`` command line: a thin shell over ``moesurg.surgery``, one file a subcommand."""
