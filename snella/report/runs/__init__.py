"""Single runs, from their folders: details for a person, differences of two, an archive of all."""
