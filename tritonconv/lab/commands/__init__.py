"""The commands of the command line, one module each.

A module has ``HELP`` (one line), ``add(parser)`` (its flags), ``run(options) -> exit code``, and ``DESCRIPTION``
and ``EXAMPLE`` for its help;
``options.command`` holds the words of the command line. :mod:`tritonconv.lab.cli` lists them. The measurements of
``bench`` are modules of their own, in ``measurements``.
"""
