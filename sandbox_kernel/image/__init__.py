"""Guest images: what goes into one (recipe), how it is made (build), where it is kept (store)."""
