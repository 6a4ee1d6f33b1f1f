"""Random changes of camera images in training: colours, geometry, noise, blur and JPEG artefacts."""
