"""The commands of ``near``: one module each, with ``add_parser(subparsers)``; heavy imports stay inside the runs."""
