"""What ``stager.integrations.accelerate`` is made of.

state   what an ``Accelerator`` has prepared and registered
"""
