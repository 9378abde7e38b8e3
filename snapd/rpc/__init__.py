"""The gRPC face of the manager: services, error details, and the `snapd` command."""
