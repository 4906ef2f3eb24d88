"""The artifact on disk: format, streaming writer, validating reader."""
