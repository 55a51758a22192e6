"""`make gpu`: everything that only a GPU shows, in stages."""
