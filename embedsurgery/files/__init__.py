"""Files on disk: safetensors, bounded JSON, copies, atomic writes and locks. Nothing here knows tables or names.

``atomic.py`` builds directories and orders the fsyncs. ``safetensors.py`` has the strict reader and the streaming
writer. ``json_reading.py`` bounds the JSON that is read, and ``json_patching.py`` changes JSON in place.
"""
