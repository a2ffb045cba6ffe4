# Stands in for CIM, which wine has not. $env:HC_CIM names a JSON file of {class: [row, ...]}; "denied" instead of rows is refused
# as Windows refuses. Takes WQL of SELECT, FROM and simple WHERE. No casts and no methods: it runs in constrained language, too.
function Get-CimInstance {
    [CmdletBinding()] param(
        [Parameter(Position = 0)][string]$ClassName, [string]$Query, [string]$Filter, [string[]]$Property,
        [string]$Namespace, [uint32]$OperationTimeoutSec)
    if ($Query -match '^\s*SELECT\s+(.+?)\s+FROM\s+(\w+)(?:\s+WHERE\s+(.+?))?\s*$') {
        $ClassName = $Matches[2]; $Filter = $Matches[3]; $Property = $Matches[1] -split '\s*,\s*'
    } elseif ($Query) {
        Write-Error -Message 'Invalid query ' -Category InvalidArgument -ErrorId 'HRESULT 0x80041017'; return
    }
    $rows = (Get-Content -Raw -LiteralPath $env:HC_CIM | ConvertFrom-Json).$ClassName
    if ($null -eq $rows) {
        Write-Error -Message 'Invalid class ' -Category MetadataError -ErrorId 'HRESULT 0x80041010'; return
    }
    if ($rows -is [string]) {
        Write-Error -Message 'Access denied ' -Category PermissionDenied -ErrorId 'HRESULT 0x80041003'; return
    }
    foreach ($term in @($Filter -split '\s+AND\s+' | Where-Object { $_ })) {
        if ($term -match "^\s*(\w+)\s*(=|<>|LIKE)\s*'?(.*?)'?\s*$") {
            $name = $Matches[1]; $how = $Matches[2]; $value = $Matches[3] -replace '%', '*'
            $rows = @($rows | Where-Object {
                if ($how -eq '<>') { "$($_.$name)" -ne $value } else { "$($_.$name)" -like $value }
            })
        }
    }
    if (-not $Property -or $Property -contains '*') { $rows }
    else { $rows | Microsoft.PowerShell.Utility\Select-Object -Property $Property }    # a restricted session has a lesser one
}
function Get-CimSession { }
Export-ModuleMember -Function Get-CimInstance, Get-CimSession
