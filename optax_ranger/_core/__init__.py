"""What every room needs: types, checks, dtypes, meshes, trees, members, updates.

Imports nothing of this package but itself.
"""
