"""What pyerofs needs of the machine that it runs on: daemons, private directories, standard streams,
progress bars, the status files of live mounts.  Knows neither EROFS nor sources."""
