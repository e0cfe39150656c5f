"""The commands of the command line, one module each.

A module has ``HELP`` (one line), ``add(parser)`` (its flags and its description) and ``run(options) -> exit code``;
``options.command`` holds the words of the command line. :mod:`tritonconv.lab.cli` lists them.
"""
