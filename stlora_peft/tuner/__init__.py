"""What plugs into PEFT; knows nothing of cities, files of readings or training."""
