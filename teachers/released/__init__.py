"""Teachers that others have published: their files, layouts, sizes."""
