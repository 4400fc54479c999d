"""Teachers behind a server and several teachers; a teacher in this process is a `DistilledModel`."""
