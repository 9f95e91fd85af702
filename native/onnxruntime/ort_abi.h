// The part of ONNX Runtime's C interface that this library uses, declared anew: no wheel ships the headers.
//
// OrtApi is a table of function pointers that only ever grows at its end, so an entry keeps its index for good and a
// table asked for as version 21 is served by every later run time. Entries that are not used are left out by number;
// `tests/onnxruntime/test_ort_library_abi.py` checks each declared one by what it does. OrtCustomOp grows in the same way: the run
// time reads as many members as `version` says.
#pragma once

#include <cstddef>
#include <cstdint>

// The version of the table and of OrtCustomOp below.
constexpr uint32_t kOrtVersion = 21;

// Opaque: only pointers cross the border.
struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtOpAttr;
struct OrtValue;
struct OrtTypeInfo;
struct OrtTensorTypeAndShapeInfo;
struct OrtApi;

enum OrtErrorCode : int { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, ORT_NOT_IMPLEMENTED = 9 };

enum OrtAttributeKind : int { ORT_ATTRIBUTE_INT = 1, ORT_ATTRIBUTE_INTS = 2 };

// The numbers of TensorProto.DataType.
enum OrtElement : int {
  ORT_UNDEFINED = 0,
  ORT_FLOAT = 1,
  ORT_UINT8 = 2,
  ORT_INT8 = 3,
  ORT_UINT16 = 4,
  ORT_INT16 = 5,
  ORT_INT32 = 6,
  ORT_INT64 = 7,
  ORT_STRING = 8,
  ORT_BOOL = 9,
  ORT_FLOAT16 = 10,
  ORT_DOUBLE = 11,
  ORT_UINT32 = 12,
  ORT_UINT64 = 13,
  ORT_BFLOAT16 = 16,
};

enum OrtCharacteristic : int { ORT_REQUIRED = 0, ORT_OPTIONAL = 1 };

struct OrtApiBase {
  const OrtApi *(*GetApi)(uint32_t version);  // null where the run time is older than `version`
  const char *(*GetVersionString)();
};

struct OrtCustomOp {
  uint32_t version;
  void *(*CreateKernel)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
  const char *(*GetName)(const OrtCustomOp *);
  const char *(*GetExecutionProviderType)(const OrtCustomOp *);  // null: the CPU
  OrtElement (*GetInputType)(const OrtCustomOp *, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp *);
  OrtElement (*GetOutputType)(const OrtCustomOp *, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp *);
  void (*KernelCompute)(void *kernel, OrtKernelContext *);
  void (*KernelDestroy)(void *kernel);
  OrtCharacteristic (*GetInputCharacteristic)(const OrtCustomOp *, size_t index);
  OrtCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp *, size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp *, size_t index);  // 0: the provider's default
  int (*GetVariadicInputMinArity)(const OrtCustomOp *);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp *);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp *);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *);
  OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **kernel);
  OrtStatus *(*KernelComputeV2)(void *kernel, OrtKernelContext *);
  OrtStatus *(*InferOutputShapeFn)(const OrtCustomOp *, OrtShapeInferContext *);
  int (*GetStartVersion)(const OrtCustomOp *);
  int (*GetEndVersion)(const OrtCustomOp *);
  size_t (*GetMayInplace)(int **inputs, int **outputs);
  void (*ReleaseMayInplace)(int *inputs, int *outputs);
  size_t (*GetAliasMap)(int **inputs, int **outputs);
  void (*ReleaseAliasMap)(int *inputs, int *outputs);
};

// Entries that are not used, first to last.
#define ORT_SKIP(first, last) const void *skipped_##first##_to_##last[(last) - (first) + 1]

struct OrtApi {
  OrtStatus *(*CreateStatus)(OrtErrorCode, const char *message);
  ORT_SKIP(1, 1);
  const char *(*GetErrorMessage)(const OrtStatus *);
  ORT_SKIP(3, 25);
  OrtStatus *(*CreateCustomOpDomain)(const char *name, OrtCustomOpDomain **);
  OrtStatus *(*CustomOpDomain_Add)(OrtCustomOpDomain *, const OrtCustomOp *);
  OrtStatus *(*AddCustomOpDomain)(OrtSessionOptions *, OrtCustomOpDomain *);
  ORT_SKIP(29, 50);
  OrtStatus *(*GetTensorMutableData)(OrtValue *, void **data);
  ORT_SKIP(52, 54);
  OrtStatus *(*CastTypeInfoToTensorInfo)(const OrtTypeInfo *, const OrtTensorTypeAndShapeInfo **);  // null: no tensor
  ORT_SKIP(56, 56);
  OrtStatus *(*CreateTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo **);
  OrtStatus *(*SetTensorElementType)(OrtTensorTypeAndShapeInfo *, OrtElement);
  OrtStatus *(*SetDimensions)(OrtTensorTypeAndShapeInfo *, const int64_t *values, size_t count);
  OrtStatus *(*GetTensorElementType)(const OrtTensorTypeAndShapeInfo *, OrtElement *);
  OrtStatus *(*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo *, size_t *count);
  OrtStatus *(*GetDimensions)(const OrtTensorTypeAndShapeInfo *, int64_t *values, size_t count);
  OrtStatus *(*GetSymbolicDimensions)(const OrtTensorTypeAndShapeInfo *, const char **names, size_t count);
  ORT_SKIP(64, 64);
  OrtStatus *(*GetTensorTypeAndShape)(const OrtValue *, OrtTensorTypeAndShapeInfo **);
  ORT_SKIP(66, 85);
  OrtStatus *(*KernelInfoGetAttribute_int64)(const OrtKernelInfo *, const char *name, int64_t *);
  ORT_SKIP(87, 87);
  OrtStatus *(*KernelContext_GetInputCount)(const OrtKernelContext *, size_t *count);
  ORT_SKIP(89, 89);
  OrtStatus *(*KernelContext_GetInput)(const OrtKernelContext *, size_t index, const OrtValue **);  // null: left out
  OrtStatus *(*KernelContext_GetOutput)(OrtKernelContext *, size_t index, const int64_t *shape, size_t, OrtValue **);
  ORT_SKIP(92, 92);
  void (*ReleaseStatus)(OrtStatus *);
  ORT_SKIP(94, 97);
  void (*ReleaseTypeInfo)(OrtTypeInfo *);
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo *);
  ORT_SKIP(100, 162);
  // With `values` null, only the count is given.
  OrtStatus *(*KernelInfoGetAttributeArray_int64)(const OrtKernelInfo *, const char *name, int64_t *values, size_t *);
  ORT_SKIP(164, 229);
  OrtStatus *(*KernelInfo_GetInputCount)(const OrtKernelInfo *, size_t *count);
  ORT_SKIP(231, 233);
  OrtStatus *(*KernelInfo_GetInputTypeInfo)(const OrtKernelInfo *, size_t index, OrtTypeInfo **);
  ORT_SKIP(235, 243);
  OrtStatus *(*KernelInfo_GetNodeName)(const OrtKernelInfo *, char *name, size_t *size);
  ORT_SKIP(245, 248);
  OrtStatus *(*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo *, size_t, int *constant, const OrtValue **);
  ORT_SKIP(250, 266);
  OrtStatus *(*ShapeInferContext_GetInputCount)(const OrtShapeInferContext *, size_t *count);
  // Lent, not given. An unknown rank reads as rank 0.
  OrtStatus *(*ShapeInferContext_GetInputTypeShape)(const OrtShapeInferContext *, size_t, OrtTensorTypeAndShapeInfo **);
  OrtStatus *(*ShapeInferContext_GetAttribute)(const OrtShapeInferContext *, const char *name, const OrtOpAttr **);
  OrtStatus *(*ShapeInferContext_SetOutputTypeShape)(const OrtShapeInferContext *, size_t,
                                                     const OrtTensorTypeAndShapeInfo *);
  OrtStatus *(*SetSymbolicDimensions)(OrtTensorTypeAndShapeInfo *, const char **names, size_t count);
  OrtStatus *(*ReadOpAttr)(const OrtOpAttr *, OrtAttributeKind, void *data, size_t size, size_t *needed);
  ORT_SKIP(273, 273);
  // batches = 0: threads take the next of `total` as they become free.
  OrtStatus *(*KernelContext_ParallelFor)(const OrtKernelContext *, void (*body)(void *, size_t), size_t total,
                                          size_t batches, void *data);
};

#undef ORT_SKIP

#define ORT_ENTRY(name, index) static_assert(offsetof(OrtApi, name) == (index) * sizeof(void *), #name)
ORT_ENTRY(CreateCustomOpDomain, 26);
ORT_ENTRY(GetTensorMutableData, 51);
ORT_ENTRY(GetTensorTypeAndShape, 65);
ORT_ENTRY(KernelContext_GetOutput, 91);
ORT_ENTRY(KernelInfoGetAttributeArray_int64, 163);
ORT_ENTRY(KernelInfoGetConstantInput_tensor, 249);
ORT_ENTRY(KernelContext_ParallelFor, 274);
#undef ORT_ENTRY
