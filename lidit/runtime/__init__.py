"""Serves every job and no model: places, files, waiting out storage that is away, leases, config files, Ray's start.

In: URIs, paths, configs. Out: files that are whole or not there, and errors that say what to do.
Imports nothing of lidit but itself; no torch.
"""
