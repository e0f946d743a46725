// Command contract prints what upstream's descriptors say about CSI and the kubelet's plugin registration, a fact a line.
// Its output is csi/tests/upstream.txt, against which csi/tests/contract.rs holds our own definitions:
//
//	go run . > ../../../csi/tests/upstream.txt
package main

import (
	"fmt"

	csi "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/reflect/protoreflect"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

func main() {
	for _, file := range []protoreflect.FileDescriptor{csi.File_csi_proto, registrationFile()} {
		messages(file.Messages())
		enums(file.Enums())
		for i := range file.Services().Len() {
			service := file.Services().Get(i)
			for j := range service.Methods().Len() {
				m := service.Methods().Get(j)
				fmt.Printf("rpc %s/%s %s -> %s\n", service.FullName(), m.Name(), m.Input().FullName(), m.Output().FullName())
			}
		}
	}
}

func registrationFile() protoreflect.FileDescriptor {
	return (&registration.PluginInfo{}).ProtoReflect().Descriptor().ParentFile()
}

func messages(list protoreflect.MessageDescriptors) {
	for i := range list.Len() {
		message := list.Get(i)
		if message.IsMapEntry() {
			continue
		}
		fmt.Printf("message %s\n", message.FullName())
		for j := range message.Fields().Len() {
			field := message.Fields().Get(j)
			fmt.Printf("field %s.%s = %d %s\n", message.FullName(), field.Name(), field.Number(), kind(field))
		}
		messages(message.Messages())
		enums(message.Enums())
	}
}

func kind(field protoreflect.FieldDescriptor) string {
	if field.IsMap() {
		return fmt.Sprintf("map %s %s", name(field.MapKey()), name(field.MapValue()))
	}
	text := name(field)
	if field.IsList() {
		text = "repeated " + text
	}
	if oneof := field.ContainingOneof(); oneof != nil {
		text += " in " + string(oneof.Name())
	}
	return text
}

func name(field protoreflect.FieldDescriptor) string {
	switch field.Kind() {
	case protoreflect.MessageKind:
		return string(field.Message().FullName())
	case protoreflect.EnumKind:
		return string(field.Enum().FullName())
	}
	return field.Kind().String()
}

func enums(list protoreflect.EnumDescriptors) {
	for i := range list.Len() {
		enum := list.Get(i)
		fmt.Printf("enum %s\n", enum.FullName())
		for j := range enum.Values().Len() {
			value := enum.Values().Get(j)
			fmt.Printf("value %s.%s = %d\n", enum.FullName(), value.Name(), value.Number())
		}
	}
}
