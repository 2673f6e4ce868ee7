"""Files on disk: safetensors, bounded JSON, copies, directories that appear whole, locks.

Nothing here knows what a table is. ``atomic.py`` has the order of fsyncs, ``safetensors.py`` the strict reader and the
streaming writer, ``json_reading.py`` the bounds on JSON.
"""
