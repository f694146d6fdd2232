"""flowengine: moves large datasets between compute sites, verified, sealed, resumable, under policy.

Importing this package loads neither trio nor aiohttp.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
