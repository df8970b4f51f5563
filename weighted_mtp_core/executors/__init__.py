"""Where tasks run: `--executor local:N` in this process, `--executor dask://HOST:PORT` on other machines."""
