"""Devices and processes: the mesh, how processes find, watch and speak to each other."""
