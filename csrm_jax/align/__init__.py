"""Alignment: policies that earn reward under constraints written as specs."""
