"""What every room needs: types, checks, dtypes, meshes, trees, and members.

Imports nothing of this package but itself.
"""
