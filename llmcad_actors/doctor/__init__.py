"""Is this machine fit, and how fast is it?"""
