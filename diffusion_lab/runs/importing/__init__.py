"""Networks of other programs: reading their files, and renaming their weights to ours."""
