"""Convert a /v1/responses request to a chat request: input items become messages."""

from lowlat.serve.protocol import limits
from lowlat.serve.protocol.chat import ChatRequest
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.messages import (
    AssistantMessage,
    Message,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from lowlat.serve.protocol.responses import (
    FlatFunction,
    FlatNamedTool,
    FlatSchemaFormat,
    FunctionCall,
    FunctionCallOutput,
    InputItem,
    InputMessage,
    Reasoning,
    ResponsesRequest,
)
from lowlat.serve.protocol.structured_outputs import (
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedSchema,
    ResponseFormat,
    TextFormat,
)
from lowlat.serve.protocol.tools import (
    CalledFunction,
    Function,
    NamedFunction,
    NamedTool,
    Tool,
    ToolCall,
    ToolChoice,
)


def as_chat(request: ResponsesRequest) -> ChatRequest:
    """`request` as a chat. Raises RequestError if it exceeds a limit of chats."""
    messages: list[Message] = []
    if request.instructions is not None:
        messages.append(SystemMessage(role="system", content=request.instructions))
    if isinstance(request.input, str):
        messages.append(UserMessage(role="user", content=request.input))
    else:
        messages += _messages(request.input)
    if len(messages) > limits.MAX_MESSAGES:
        raise RequestError(
            f"input: more than {limits.MAX_MESSAGES} messages, instructions included",
            param="input",
        )
    return ChatRequest(
        model=request.model,
        messages=messages,
        max_completion_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        tools=[_tool(tool) for tool in request.tools] if request.tools else None,
        tool_choice=_tool_choice(request),
        parallel_tool_calls=request.parallel_tool_calls if request.tools else None,
        response_format=_format(request),
        priority=request.priority,
        deadline_seconds=request.deadline_seconds,
    )


def _messages(items: list[InputItem]) -> list[Message]:
    """Items as messages; consecutive reasoning, text and calls form one assistant message."""
    messages: list[Message] = []
    for item in items:
        match item:
            case InputMessage(role="user"):
                messages.append(UserMessage(role="user", content=_text(item)))
            case InputMessage(role="assistant"):
                _extend(messages, AssistantMessage(role="assistant", content=_text(item)))
            case InputMessage(role="system" | "developer" as role):
                messages.append(SystemMessage(role=role, content=_text(item)))
            case FunctionCallOutput():
                messages.append(
                    ToolMessage(role="tool", content=item.output, tool_call_id=item.call_id)
                )
            case FunctionCall():
                _extend(messages, AssistantMessage(role="assistant", tool_calls=[_call(item)]))
            case Reasoning():
                thought = "".join(part.text for part in item.content)
                messages.append(AssistantMessage(role="assistant", reasoning_content=thought))
            case InputMessage():
                pass
    return messages


def _extend(messages: list[Message], more: AssistantMessage) -> None:
    """Append `more`, merged into a preceding assistant message that it continues."""
    last = messages[-1] if messages else None
    if not isinstance(last, AssistantMessage) or (
        more.content is not None and (last.content is not None or last.tool_calls is not None)
    ):
        messages.append(more)
        return
    calls = [*(last.tool_calls or []), *(more.tool_calls or [])]
    if len(calls) > limits.MAX_TOOLS:
        raise RequestError(
            f"input: more than {limits.MAX_TOOLS} function calls in a row", param="input"
        )
    messages[-1] = AssistantMessage(
        role="assistant",
        content=last.content if more.content is None else more.content,
        reasoning_content=last.reasoning_content,
        tool_calls=calls or None,
    )


def _text(message: InputMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text for part in message.content)


def _call(item: FunctionCall) -> ToolCall:
    function = CalledFunction(name=item.name, arguments=item.arguments)
    return ToolCall(id=item.call_id, type="function", function=function)


def _tool(tool: FlatFunction) -> Tool:
    function = Function(
        name=tool.name,
        description=tool.description,
        parameters=tool.parameters,
        strict=tool.strict,
    )
    return Tool(type="function", function=function)


def _tool_choice(request: ResponsesRequest) -> ToolChoice | None:
    choice = request.tool_choice
    if isinstance(choice, FlatNamedTool):
        return NamedTool(type="function", function=NamedFunction(name=choice.name))
    # Clients send "auto" even without tools.
    return None if choice == "auto" and not request.tools else choice


def _format(request: ResponsesRequest) -> ResponseFormat | None:
    match None if request.text is None else request.text.format:
        case FlatSchemaFormat() as given:
            schema = NamedSchema.model_validate(given.model_dump(by_alias=True, exclude={"type"}))
            return JsonSchemaFormat(type="json_schema", json_schema=schema)
        case TextFormat() | JsonObjectFormat() as given:
            return given
        case None:
            return None
