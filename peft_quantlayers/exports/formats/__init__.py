"""One object per export format; :mod:`.format_registry` lists them."""
