"""integrations: BackSlash inside other trainers; each file needs its own package, and none is imported from here."""
