"""Teachers behind a server and several teachers, as `near_future.protocol` asks; one here is a `DistilledModel`."""
