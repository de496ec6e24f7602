"""The active slice: the small trained parameter beside a frozen weight, and what keeps both in agreement."""
