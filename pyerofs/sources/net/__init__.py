"""HTTP: one client, the ranges of a URL, credentials and the challenges that ask for them."""
