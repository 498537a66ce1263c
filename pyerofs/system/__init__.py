"""Operating system support: daemons, private directories, standard streams, progress bars, the
status files of live mounts.  Independent of EROFS and of sources."""
