"""One object per export format; :mod:`.registry` lists them."""
