"""Phantoms of the five target tasks, in the on-disk formats in which the real data comes.

OUT/
  LUNA16/       ncc: subset0 … subset9, annotations.csv, candidates.csv (V1), candidates_V2.csv
  LIDC-IDRI/    ncs: LIDC-IDRI-0001/…/000001.dcm … and the readers' XML
  LiTS/         lcs: volume-0.nii.gz, segmentation-0.nii.gz; labels 1 liver, 2 tumour
  CTPA/         ecc: PA001.nii.gz … and candidates.csv, patient,series,x,y,z,label,fold
  BraTS/        bms: BraTS_0001/BraTS_0001_{flair,t1,t1ce,t2,seg}.nii.gz; labels 1, 2, 4

Chests are those of `make_scan`, of seeds that pretraining's phantoms do not use. What is to be found has the
intensities of something beside it, so that a mean alone does not tell it: nodules of vessels, emboli of nodes at a
vessel's wall, a liver of the organs round it, a tumour's oedema of white matter lesions.
"""
