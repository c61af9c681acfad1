"""LightningDataModules on image folders."""

from framework.datamodules.base import ImageDataModule
from framework.datamodules.domain_pair import DomainPairDataModule
from framework.datamodules.image_folder import ImageFolderDataModule
from framework.datamodules.unlabelled_folder import UnlabelledFolderDataModule

__all__ = ["DomainPairDataModule", "ImageDataModule", "ImageFolderDataModule", "UnlabelledFolderDataModule"]
