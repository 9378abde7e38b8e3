"""Client libraries: what agents and the command line speak to the service and its devices with."""
