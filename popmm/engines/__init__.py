"""popmm inside inference engines, by their public plug-in points. Nothing else of popmm imports this."""
