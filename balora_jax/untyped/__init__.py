"""The one door for untyped input: texts and values of files become checked, bounded ones here."""
