"""HALOC: differentiable search of ranks on a super-net."""
