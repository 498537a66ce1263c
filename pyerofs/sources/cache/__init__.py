"""What was fetched: segments on disk or in memory, the directory that processes share, and the
source that fetches what is missing."""
