"""Netfence: an eBPF egress fence for VMs and containers, driven by a central control plane."""

__version__ = "0.1.0"
