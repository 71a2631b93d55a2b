"""The verbs, a file each: ``POSITIONALS``, ``add_arguments(parser)`` and ``run(settings) -> Result``."""
