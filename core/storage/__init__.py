"""Files and folders that several processes share and that later commands must be able to rely on."""
