"""Executors, which run tasks in this process (`local:N`) or on other machines (`dask://HOST:PORT`)."""
